"""llama.cpp's own converter, told which pre-tokenizer ours is: `python -m … SOURCES MODEL OUTFILE`.

The converter knows tokenizers by the hash of a test text, and ours is not among them; as a plain
byte-level BPE it is GPT-2's. Prompts are token ids anyway. It looks for SentencePiece first, which
would have to be installed to find that there is none.
"""

import sys
from typing import Any, NoReturn


def main() -> None:
    """Writes bfloat16 weights."""
    sources, model, outfile = sys.argv[1:]
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    import convert_hf_to_gguf
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    base.TextModel._set_vocab_sentencepiece = _no_sentencepiece
    sys.argv[1:] = ["--outtype", "bf16", "--outfile", outfile, model]
    convert_hf_to_gguf.main()


def _no_sentencepiece(*_: Any, **__: Any) -> NoReturn:
    raise FileNotFoundError("no SentencePiece model")


if __name__ == "__main__":
    main()
