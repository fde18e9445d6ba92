"""Error rates and time errors of a model on labelled shards, with the project's own recogniser.

    python -m training.evaluate --model DIR --data DIR [--limit N] [--show N]

Chinese counts characters, English words, a mixture both. Each utterance is given whole, without a
VAD: what is measured is the model.
"""

from __future__ import annotations
