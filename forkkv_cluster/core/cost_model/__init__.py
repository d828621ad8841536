"""What agents over one context cost on a card, by arithmetic alone: bytes, FLOPs, floor times, throughput of each sharing.

``shapes``: models and adapters. ``cards``. ``memory``: bytes of KV. ``work``: bytes moved and arithmetic of prefill and decode.
``plan`` puts them together.
"""
