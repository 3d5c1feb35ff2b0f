module modelpack.invalid/tests/engine/clients/go_openai

go 1.24

require github.com/sashabaranov/go-openai v1.43.0
