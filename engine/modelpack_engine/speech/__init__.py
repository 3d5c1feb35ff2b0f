"""Speech-to-text models: samples of sound to a transcript; no HTTP.

mlx-audio (the extra `audio`) has the models and their decoding. In: a `TranscriptionRequest` with
float32 samples at 16 kHz. Out: a `Transcript` with segments and words. Read `transcript` first,
then `whisper`, `moonshine`, `parakeet`, `loader` and `async_transcriber`.
"""
