"""One run for each question: what is varied, how it is measured, what is written."""
