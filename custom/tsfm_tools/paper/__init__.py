"""The paper's tables: grids of runs, and what came out of them.

A grid and data sets enter; runs of the bundles and tables in the paper's shape leave. It must not know how a run trains.
"""
