"""The output's vocabulary: chosen (plan.py), rows of embeddings and heads (rows.py), tokenizer files."""
