"""A soak: thousands of intents, many agents, every door, two brokers, and a monkey that breaks things.

`make chaos`, or `python -m tests.chaos --minutes 3 --seed 7`. Everything random is drawn from the seed before
anything starts (`plan`); what counts is what the destination wrote down (`destination`, `count`).
"""
