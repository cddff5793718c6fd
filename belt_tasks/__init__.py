"""The stages of belt as plain functions: a reference and a spec in, a receipt out."""
