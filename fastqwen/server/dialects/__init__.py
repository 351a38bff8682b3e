"""The APIs: what their requests and answers look like. Each asks the same of ``answer``."""
