"""Conversations to text and to marked tokens: templates, and the sandbox that renders them."""
