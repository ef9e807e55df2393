"""The real modelling code run without its data: what transformers and torch do, instead of formulas. Needs torch."""
