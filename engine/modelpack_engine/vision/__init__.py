"""Pictures in prompts: mlx-vlm's model classes on the engine's KV blocks.

In comes a prompt with a placeholder token for each picture, and the decoded pictures. `processor`
replaces each placeholder by the tokens of its picture and makes the encoder's input; `encoder` runs
the vision tower, whose embeddings replace those of the picture's tokens; `models` has the types,
and `towers` builds their towers, by the tables of `tower_types`. Read `processor` first. All of it
needs the extra `vision`.
"""
