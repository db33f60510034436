"""The report of a validation: one JSON, and Markdown, HTML and plots that are made of it."""
