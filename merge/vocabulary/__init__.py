"""Reads, unites and compares tokenizers as plain data.

tokenizer.py   read_tokenizer: the tokenizer files of a directory
union.py       several tokenizers -> one that has the tokens of all
surface.py     a token -> the bytes it stands for, so that families can be compared
files.py       the tokenizer files of an output
report.py      what differs between tokenizers
"""
