"""METEOR of generated answers: nltk's implementation, and METEOR 1.5 over a corpus where pycocoevalcap and Java are.

nltk follows the first METEOR (Banerjee and Lavie, 2005: exact, stem and WordNet matches, alpha 0.9, beta 3, gamma 0.5);
METEOR 1.5 (Denkowski and Lavie, 2014) has paraphrases and tuned weights. The two are different scales. The paper does
not say which one its tables hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from ..packages import is_installed, require_package

WORDNET = "corpora/wordnet"


def require_wordnet() -> None:
    """Raise unless nltk and its WordNet data are there; no package brings the data, and nothing is fetched unasked.

    Raises:
        ImportError: nltk is not installed.
        FileNotFoundError: WordNet is missing, with the command that gets it.
    """
    require_package("nltk", "METEOR")
    import nltk

    for name in (f"{WORDNET}.zip", WORDNET):
        try:
            nltk.data.find(name)
            return
        except LookupError:
            continue
    raise FileNotFoundError(
        "METEOR needs WordNet (10 MB), which nltk does not find. Get it once with `python -m nltk.downloader wordnet`; "
        f"without network unpack wordnet.zip of github.com/nltk/nltk_data into {nltk.data.path[0]}/{WORDNET}, or into "
        "corpora/wordnet of any folder and set NLTK_DATA to it."
    )


def meteor(prediction: str, reference: str) -> float:
    """METEOR of one answer, in [0, 1], over words and punctuation marks, lower case."""
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(wordpunct_tokenize(reference), wordpunct_tokenize(prediction)))


def corpus_meteor(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    """METEOR 1.5 over a corpus, in [0, 1]; None without pycocoevalcap or Java."""
    if not (predictions and is_installed("pycocoevalcap") and shutil.which("java")):
        return None
    from pycocoevalcap.meteor.meteor import Meteor

    # Its protocol has one text per line.
    texts = [{str(n): [" ".join(text.split())] for n, text in enumerate(part)} for part in (references, predictions)]
    return float(Meteor().compute_score(*texts)[0])
