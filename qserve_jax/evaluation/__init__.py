"""What quantisation costs: perplexity, agreement with float and multiple-choice tasks, compared."""
