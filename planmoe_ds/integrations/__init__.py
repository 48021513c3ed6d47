"""Adapters to the frameworks: they translate, they do not compute."""
