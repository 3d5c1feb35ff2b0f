"""Conversations with a model, whatever API they came by: a ChatSpec in, ChatDeltas out.

    async with await start_chat(model, spec) as stream:
        async for delta in stream:
            ...

The names are imported from their modules: `spec` for what is asked and answered, `chat` for
`start_chat`, `served` for the model.
"""
