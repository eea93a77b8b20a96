"""How the bundled demo model is made: synthetic data, tokenizer, training loop and evaluation.

Nothing here is imported by the engine. The package needs the repository's development extras and, for the full
recipe, the Debian packages listed in ``training/README.md`` (fonts and ``espeak-ng``).
"""
