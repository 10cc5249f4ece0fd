"""Chats in, token files with target masks out."""
