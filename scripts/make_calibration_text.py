"""Make qserve_jax/assets/calibration/stories.txt, which quantize reads without --calib-file.

Stories that the demo model was trained on, in a random order (seed 0), none of those held out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tinystories import load_stories

TEXT = Path(__file__).parents[1] / "qserve_jax/assets/calibration/stories.txt"
CHARACTERS = 2**18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two excerpts")
    stories = load_stories(parser.parse_args().data).train
    kept, total = [], 0
    for i in np.random.default_rng(0).permutation(len(stories)):
        if total + len(stories[i]) > CHARACTERS:
            break
        kept.append(stories[i])
        total += len(stories[i]) + 2
    TEXT.parent.mkdir(exist_ok=True)
    TEXT.write_text("\n\n".join(kept) + "\n", encoding="utf-8")
    print(f"{len(kept)} stories, {TEXT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
