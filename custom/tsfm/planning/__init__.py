"""Planning: the decisions before a run, from the data and from pretrained weights.

A pool, what the user asked for and the weights' description enter; preparation, patch, network and transferred weights
leave. It must not know of the loop that trains them.
"""
