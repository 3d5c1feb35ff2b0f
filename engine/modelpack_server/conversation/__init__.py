"""Conversations with a model, independent of any API: a ChatSpec in, ChatDeltas out.

    async with await start_chat(model, spec) as stream:
        async for delta in stream:
            ...

Import from the modules: `spec` has requests and deltas, `chat` has `start_chat`, `served_model` the
model. Read `chat` first.
"""
