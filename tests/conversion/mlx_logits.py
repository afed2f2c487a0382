"""A published folder through mlx-lm: logits and a greedy continuation, as an .npz file.

Run by the Python that has mlx-lm, which has neither deltamoe nor torch:
``python mlx_logits.py FOLDER IDS_AS_JSON COUNT OUT``.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def main(folder: str, ids_as_json: str, count: str, out: str) -> None:
    model, _ = load_model(Path(folder))
    ids = json.loads(ids_as_json)
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    cache = make_prompt_cache(model)
    read, continued = ids, []
    for _ in range(int(count)):
        scores = model(mx.array([read]), cache=cache)[0, -1]
        read = [int(mx.argmax(scores).item())]
        continued += read
    np.savez(out, logits=logits, continued=np.array(continued))


if __name__ == "__main__":
    main(*sys.argv[1:])
