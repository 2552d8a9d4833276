"""How the shipped pocket policy was made: corpus, tokenizer, training. Unused at run time."""
