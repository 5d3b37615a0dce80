"""The label doctor's parts: what is seen, the rules, what is reported."""
