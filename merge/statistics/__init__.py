"""Collects the statistics of a model that `regmean` and `fisher` need (`merge statistics`).

    collect.py  collect_statistics: the one verb; parts, resume, the file in the end
    data.py     a file of texts -> batches of token numbers
    gram.py     X^T X of the inputs of linear layers, one decoder layer in memory at a time
    fisher.py   squared gradients of the log-likelihood, the whole model in memory
    parts.py    OUT.partial: what is done already; the parts put together

A statistics file is safetensors, float32: "gram.NAME" (in, in) and "fisher.NAME" (as the weight), where NAME is the
weight's name in the checkpoint.
"""

from merge.statistics.collect import StatisticsSummary, collect_statistics

__all__ = ["StatisticsSummary", "collect_statistics"]
