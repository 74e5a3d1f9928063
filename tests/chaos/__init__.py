"""A soak test: thousands of intents, many agents, all ways to call, two brokers, and a monkey that breaks things.

Run it with `make chaos` or `python -m tests.chaos --minutes 3 --seed 7`. Everything random is drawn from the seed
before anything starts (`plan`). The verdict comes from what the destination wrote down (`destination`, `count`).

A "door" is one way to call a task (`doors`).
"""
