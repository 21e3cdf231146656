"""Evaluation of a Hugging Face folder without a download: perplexity, needles, what the index keeps."""
