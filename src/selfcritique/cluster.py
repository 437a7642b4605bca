"""The Ray cluster of `engine=ray` and `hydra/launcher=ray`."""

import logging
import os
from typing import Any

from selfcritique.errors import UserError


def start_ray(**options: Any) -> Any:
    """The package, connected to the cluster that RAY_ADDRESS names, or to one that ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves beside any other work of the machine
    try:
        import ray
    except ImportError:
        raise UserError(
            "Ray is not installed: run `pip install ray`, or do without it (engine=hf)."
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, logging_level=logging.ERROR, **options)
        except ConnectionError as error:
            raise UserError(
                f"No Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}, or it wants a token "
                f"(RAY_AUTH_MODE=token): {error}"
            ) from None
    return ray
