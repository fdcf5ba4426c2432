"""`merge convert X -o model.gguf`: a model, or what a recipe makes, as a file for llama.cpp and Ollama."""
