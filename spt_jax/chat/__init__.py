"""Conversations: a model's chat template, replies in tokens, and talking to a model."""

from spt_jax.chat.template import ChatTemplate, Message, encode_messages

__all__ = ["ChatTemplate", "Message", "encode_messages"]
