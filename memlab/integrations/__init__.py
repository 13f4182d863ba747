"""memlab in other libraries' training loops: a callback each, imported by who has the library.

- *transformers*: `MemlabCallback` for the Trainer of Hugging Face and those of TRL;
- *lightning*: `MemlabCallback` for Lightning's Trainer.
"""
