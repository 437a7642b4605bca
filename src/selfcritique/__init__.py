"""The Self-Critique pipeline of ChatGLM-Math (arXiv 2404.02893) as an experiment repository."""
