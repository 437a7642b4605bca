"use strict";
// The samples: an index that filters work on, and texts in compressed chunks that are unpacked when needed.

const PAGE = 50; // rows shown at once
const FILTERS = ["stage", "verdict", "decision", "family"];
const $ = (id) => document.getElementById(id);
const form = $("filters");
let index, found = [], shown = 0, open = -1, latest = 0;
const chunks = []; // number -> promise of its samples
const texts = []; // sample -> what search looks through, once its chunk is there

async function unpack(script) {
  const bytes = Uint8Array.from(atob(script.textContent), (c) => c.charCodeAt(0));
  script.remove();
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const scripts = [...document.querySelectorAll("script.chunk")];
function chunk(number) {
  chunks[number] ??= unpack(scripts[number]).then((samples) => {
    samples.forEach((s, i) => {
      const parts = [s.question, s.response, s.response_id, ...s.critiques.map((c) => c.text)];
      texts[number * index.chunk + i] = parts.join("\n").toLowerCase();
    });
    return samples;
  });
  return chunks[number];
}
const sample = async (i) => (await chunk(Math.floor(i / index.chunk)))[i % index.chunk];
const all = () => Promise.all(scripts.map((_, number) => chunk(number)));
const name = (column, i) => index[column].names[index[column].codes[i]] ?? "";
const about = (i) => [name("verdict", i), `score ${score(i)}`, name("decision", i)].filter(Boolean);
const score = (i) => (index.score[i] === null ? "–" : String(+index.score[i].toFixed(2)));

// ---- the address holds the filters and what is open --------------------------------------------------

function state() {
  const set = [...new FormData(form)].filter(([, value]) => value !== "");
  if (open >= 0) set.push(["open", `${name("stage", open)}/${index.id[open]}`]);
  return new URLSearchParams(set);
}

function link(i) {
  const next = state();
  next.set("open", `${name("stage", i)}/${index.id[i]}`);
  return `#${next}`;
}

async function follow() {
  if (!location.hash.includes("=")) return;
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const field of form.elements) if (field.name) field.value = wanted.get(field.name) ?? "";
  const [id, stage] = (wanted.get("open") ?? "").split("/").reverse();
  const at = index.id.findIndex((known, i) => known === id && (!stage || name("stage", i) === stage));
  await filter();
  if (at >= 0) await show(at);
  else if (id) $("sample").replaceChildren(element("p", `This report holds no sample ${id}.`));
}

// ---- filter and search -------------------------------------------------------------------------------

async function filter() {
  const turn = ++latest;
  const codes = FILTERS.filter((f) => form[f].value !== "").map((f) => [index[f].codes, Number(form[f].selectedOptions[0].dataset.code)]);
  const [low, high] = [form.low, form.high].map((field) => field.value);
  const text = form.q.value.trim().toLowerCase();
  if (text && texts.length < index.id.length) $("count").textContent = "Unpacking the texts …";
  if (text) await all();
  if (turn !== latest) return; // another filter has come meanwhile
  found = index.id.map((_, i) => i).filter((i) =>
    codes.every(([column, code]) => column[i] === code) &&
    (low === "" || (index.score[i] !== null && index.score[i] >= low)) &&
    (high === "" || (index.score[i] !== null && index.score[i] <= high)) &&
    (!text || texts[i].includes(text)));
  $("count").textContent = `${found.length.toLocaleString("en")} of ${index.id.length.toLocaleString("en")} samples.`;
  $("list").replaceChildren();
  shown = 0;
  more();
}

function more() {
  const rows = found.slice(shown, shown + PAGE);
  shown += rows.length;
  $("list").append(...rows.map(row));
  $("more").hidden = shown >= found.length;
}

function row(i) {
  const anchor = element("a");
  anchor.href = link(i);
  anchor.dataset.sample = i;
  if (i === open) anchor.setAttribute("aria-current", "true");
  const verdict = element("b", name("verdict", i));
  verdict.className = name("verdict", i);
  const head = element("span", "", verdict, ` · ${[...about(i).slice(1), name("stage", i)].join(" · ")}`);
  const preview = element("span", "…");
  sample(i).then((s) => { preview.textContent = s.question; });
  anchor.append(head, preview);
  return element("li", "", anchor);
}

// ---- one sample --------------------------------------------------------------------------------------

function element(tag, text = "", ...children) {
  const made = document.createElement(tag);
  made.append(...(text === "" ? [] : [text]), ...children);
  return made;
}

const block = (title, text) => [element("h3", title), element("pre", text || "–")];

function reference(i, ...rest) {
  const anchor = element("a", `${name("stage", i)}/${index.id[i]}`);
  anchor.href = link(i);
  return element("li", "", anchor, ` ${about(i).join(", ")}`, ...rest);
}

async function show(i) {
  open = i;
  const s = await sample(i);
  if (open !== i) return;
  const siblings = index.problem.flatMap((p, j) => (p === index.problem[i] && j !== i ? [j] : []));
  const partners = s.partners.map((p) => {
    const j = index.id.findIndex((id, at) => id === p.partner && name("stage", at) === s.stage);
    const margin = `, margin ${p.margin}`;
    return j >= 0 ? reference(j, margin) : element("li", `${p.partner} (not in this sample), score ${p.score}${margin}`);
  });
  const facts = [`${s.verdict}: ${s.answer ?? "no answer"} for ${s.gold}`, ...about(i).slice(1),
    `${s.n_tokens} tokens${s.truncated ? ", cut off" : ""}`, ...[s.source, s.family, s.register].filter(Boolean), `difficulty ${s.difficulty}`];
  $("sample").replaceChildren(
    element("h3", `${s.stage}/${s.response_id}`), element("p", facts.join(" · ")),
    ...block("Question", s.question), ...block("Reference", s.reference), ...block("Response", s.response),
    ...s.critiques.flatMap((c) => block(`Critique: ${c.score ?? "no score"} (${c.parse})`, c.text)),
    ...(partners.length ? [element("h3", `Paired, as ${s.decision}, with`), element("ul", "", ...partners)] : []),
    ...(siblings.length ? [element("h3", "Other responses to this question"), element("ul", "", ...siblings.map((j) => reference(j)))] : []),
  );
  for (const anchor of $("list").querySelectorAll("a")) {
    if (Number(anchor.dataset.sample) === i) anchor.setAttribute("aria-current", "true");
    else anchor.removeAttribute("aria-current");
  }
}

function step(by) {
  const at = found.indexOf(open) + by;
  if (at < 0 || at >= found.length) return;
  while (at >= shown) more();
  location.hash = link(found[at]);
  $("list").querySelector(`[data-sample="${found[at]}"]`).scrollIntoView({ block: "nearest" });
}

function keys(event) {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = { "/": () => form.q.focus(), j: () => step(1), k: () => step(-1) }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

async function start() {
  index = await unpack($("index"));
  for (const column of FILTERS) {
    const options = index[column].names.map((text, code) => {
      const option = element("option", text);
      option.value = text;
      option.dataset.code = code;
      return option;
    });
    form[column].append(...options);
  }
  const held = index.id.length, total = index.total;
  $("held").textContent = held === total ? `All ${total.toLocaleString("en")} responses of this run.`
    : `${held.toLocaleString("en")} of ${total.toLocaleString("en")} responses: drawn in proportion from every stage × verdict × decision, at least one of each.`;
  $("samples").hidden = false;
  const changed = async () => {
    history.replaceState(null, "", `#${state()}`);
    await filter();
  };
  form.addEventListener("input", changed);
  form.addEventListener("reset", () => setTimeout(changed));
  form.addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", more);
  addEventListener("hashchange", follow);
  addEventListener("keydown", keys);
  await filter();
  await follow();
  if (location.hash) document.querySelector(location.hash.includes("=") ? "#samples" : location.hash)?.scrollIntoView();
  for (const number of scripts.keys()) await chunk(number); // so that search need not wait
  document.body.dataset.ready = "true";
}

if ($("index")) start();
