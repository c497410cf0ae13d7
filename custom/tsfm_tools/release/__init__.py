"""Releases: weights and a bundle's folder become a zip that stands alone, and the checks that it does.

A bundle and a checkpoint enter; a staged bundle, an exported network and a table of checks leave. It must not know of
training.
"""
