"""Tools besides merging and training, for cli and Python users alike.

perplexity.py     merge perplexity, and KL divergence; logits.py: of one decoder layer in memory at a time
quantize.py       merge quantize; quantizers.py, stored_formats.py: the formats; short_perplexity.py: before and after
memory.py         merge memory; memory_math.py: closed forms; memory_trace.py: what transformers' code allocates
formats.py        numbers in each format; format_survey.py: a checkpoint's weights in them
loaded.py         a model in memory; generate.py, classify.py: what is done with it
"""
