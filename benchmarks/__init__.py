"""How fast the library's loop is, beside the loops a user would otherwise pick and beside what the machine could do.

    python -m benchmarks                        # all pairs, one record each below data/results/benchmarks/
    python -m benchmarks --pair lenet --images 6400 --repeats 3

The page "How fast, and against what bound" reads the newest record of each pair.
"""
