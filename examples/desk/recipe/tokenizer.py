"""The pocket policy's tokenizer: whole words for the desk's language, bytes for all else.

A byte-level BPE without merges: a pre-token that stands in the vocabulary is one piece, any other
falls apart into its bytes. So names and numbers, which are open-ended, are always spelt out, digits
one by one, and no piece of a learnt word ever swallows part of a name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>")
# JSON scaffolding in one piece (keys with their punctuation), then words, digits, the rest.
PIECES = (
    r'\{"[a-z_]+": ?"?|"?, ?"[a-z_]+": ?"?|"?[\}\]]+,?|'
    r"(?:system|user|assistant|tool)\n| ?[A-Za-z_]+|[0-9]|\s+|[^\sA-Za-z0-9]"
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') -}}"
    "{%- for call in message.get('tool_calls') or [] -%}"
    '{{- \'<tool_call>{"name": "\' + call.function.name + \'", "arguments": \' -}}'
    "{{- call.function.arguments if call.function.arguments is string"
    " else call.function.arguments | tojson -}}"
    "{{- '}</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def build_tokenizer(texts: Iterable[str], *, least: int) -> Tokenizer:
    """Make every pre-token that stands `least` times in `texts` a piece; others are spelt out."""
    split = _pre_tokenizer()
    counts: Counter[str] = Counter()
    markers = re.compile("|".join(re.escape(marker) for marker in (*SPECIALS, *MARKERS)))
    for text in texts:
        for part in markers.split(text):
            counts.update(piece for piece, _ in split.pre_tokenize_str(part))
    words = sorted(word for word, n in counts.items() if n >= least and len(word) > 1)
    pieces = [*SPECIALS, *MARKERS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], ignore_merges=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers and vLLM load the same tokenizer from."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without this, transformers puts the model type's own pre-tokenizer in place of ours.
        "auto_map": {"AutoTokenizer": [None, None]},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
