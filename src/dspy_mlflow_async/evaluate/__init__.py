"""Evaluations for users: async programs, many evaluations at once, compared, within a budget, resumed."""
