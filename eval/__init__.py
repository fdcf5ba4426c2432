"""Measures whether a merge is better than its parents, through lm-eval.

Start with harness.py. All models answer the same items, and their answers are stored.

models.py       what is judged: directories, hub ids, model+adapter, recipes
settings.py     how it is run; backends.py: lm-eval's models, and servers
items.py        tasks with their data; tasks/: suites and tasks of our own; missing.py: what to do without the data
model_proxy.py  a stand-in for the model that remembers its answers, in memory.py
results.py      what was found, as plain data; join.py: of several files
difference.py   two models on the same items, with uncertainty; compare.py: merges and their parents
tables.py, html.py (plots.py, agreement.py), card.py   what people see of it
path.py, soup.py      interpolation paths, greedy soups; blends.py: their averages
search/         looks for the recipe that scores best; start with search/run.py
sandbox/        runs code that models write; exact_match.py: the skills of the quickstart family
"""
