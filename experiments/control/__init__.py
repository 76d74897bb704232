"""Reinforcement learning with memory: games of cards, and PPO on recurrent models."""
