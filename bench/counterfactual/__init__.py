"""Counterfactual estimates judged by known truths: a simulator, and public logs with true propensities."""
