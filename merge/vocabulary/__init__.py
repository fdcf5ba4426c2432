"""Tokenizers as plain data: read, united, compared, transplanted.

tokenizer.py   read_tokenizer: the tokenizer files of a directory
union.py       several tokenizers -> one that has the tokens of all
surface.py     a token -> the bytes it stands for, so that families can be compared
chat.py        chat templates: those inputs have, those known by name, text
files.py       the tokenizer files of an output
report.py      what differs between tokenizers
transplant.py  one model's tokenizer for another's embeddings
omp.py         orthogonal matching pursuit
"""
