// What go-openai makes of the server at the URL given, as JSON on standard output:
// {feature: result, or {"error": text}}.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/sashabaranov/go-openai"
	"github.com/sashabaranov/go-openai/jsonschema"
)

type result map[string]any

type city struct {
	City string `json:"city"`
}

var (
	client         *openai.Client
	chatModel      string
	embeddingModel string
	background     = context.Background()
)

func asked(tokens int) openai.ChatCompletionRequest {
	return openai.ChatCompletionRequest{
		Model:     chatModel,
		MaxTokens: tokens,
		// It leaves a temperature of 0 out; greedy all the same.
		Temperature: 1e-6,
		Messages: []openai.ChatCompletionMessage{
			{Role: openai.ChatMessageRoleUser, Content: "What is the capital of France?"},
		},
	}
}

func chat() (result, error) {
	reply, err := client.CreateChatCompletion(background, asked(12))
	if err != nil {
		return nil, err
	}
	return result{
		"text":   reply.Choices[0].Message.Content,
		"finish": reply.Choices[0].FinishReason,
		"tokens": []int{reply.Usage.PromptTokens, reply.Usage.CompletionTokens},
	}, nil
}

func stream() (result, error) {
	request := asked(12)
	request.StreamOptions = &openai.StreamOptions{IncludeUsage: true}
	found := result{}
	text, pieces := "", 0
	stream, err := client.CreateChatCompletionStream(background, request)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if chunk.Usage != nil {
			found["tokens"] = []int{chunk.Usage.PromptTokens, chunk.Usage.CompletionTokens}
		}
		for _, choice := range chunk.Choices {
			text += choice.Delta.Content
			pieces++
			if choice.FinishReason != "" {
				found["finish"] = choice.FinishReason
			}
		}
	}
	found["text"], found["pieces"] = text, pieces
	return found, nil
}

func tools() (result, error) {
	parameters, err := jsonschema.GenerateSchemaForType(city{})
	if err != nil {
		return nil, err
	}
	request := asked(40)
	request.Tools = []openai.Tool{{
		Type:     openai.ToolTypeFunction,
		Function: &openai.FunctionDefinition{Name: "weather", Parameters: parameters},
	}}
	request.ToolChoice = openai.ToolChoice{
		Type: openai.ToolTypeFunction, Function: openai.ToolFunction{Name: "weather"},
	}
	reply, err := client.CreateChatCompletion(background, request)
	if err != nil {
		return nil, err
	}
	message := reply.Choices[0].Message
	if len(message.ToolCalls) != 1 {
		return nil, fmt.Errorf("%d tool calls", len(message.ToolCalls))
	}
	call := message.ToolCalls[0]
	var arguments city
	if err := parameters.Unmarshal(call.Function.Arguments, &arguments); err != nil {
		return nil, err
	}
	request.ToolChoice = "none"
	request.Messages = append(request.Messages, message, openai.ChatCompletionMessage{
		Role: openai.ChatMessageRoleTool, ToolCallID: call.ID, Content: "sunny",
	})
	answer, err := client.CreateChatCompletion(background, request)
	if err != nil {
		return nil, err
	}
	return result{
		"called": []string{arguments.City},
		"text":   answer.Choices[0].Message.Content,
	}, nil
}

func schema() (result, error) {
	definition, err := jsonschema.GenerateSchemaForType(city{})
	if err != nil {
		return nil, err
	}
	request := asked(40)
	request.ResponseFormat = &openai.ChatCompletionResponseFormat{
		Type: openai.ChatCompletionResponseFormatTypeJSONSchema,
		JSONSchema: &openai.ChatCompletionResponseFormatJSONSchema{
			Name: "city", Schema: definition, Strict: true,
		},
	}
	reply, err := client.CreateChatCompletion(background, request)
	if err != nil {
		return nil, err
	}
	var object city
	err = definition.Unmarshal(reply.Choices[0].Message.Content, &object)
	return result{"object": object}, err
}

func embeddings() (result, error) {
	lengths := []int{}
	var vectors [][]float32
	for _, format := range []openai.EmbeddingEncodingFormat{
		openai.EmbeddingEncodingFormatFloat, openai.EmbeddingEncodingFormatBase64,
	} {
		reply, err := client.CreateEmbeddings(background, openai.EmbeddingRequestStrings{
			Model:          openai.EmbeddingModel(embeddingModel),
			Input:          []string{"Paris is a city."},
			EncodingFormat: format,
		})
		if err != nil {
			return nil, err
		}
		lengths = append(lengths, len(reply.Data[0].Embedding))
		vectors = append(vectors, reply.Data[0].Embedding)
	}
	return result{"lengths": lengths, "vectors": vectors}, nil
}

func refusal() (result, error) {
	request := asked(12)
	request.Model = "nope"
	_, err := client.CreateChatCompletion(background, request)
	var refused *openai.APIError
	if !errors.As(err, &refused) {
		return nil, fmt.Errorf("no APIError: %v", err)
	}
	return result{"status": refused.HTTPStatusCode, "code": refused.Code}, nil
}

func main() {
	config := openai.DefaultConfig("none")
	config.BaseURL = os.Args[1] + "/v1"
	client, chatModel, embeddingModel = openai.NewClientWithConfig(config), os.Args[2], os.Args[3]
	results := map[string]result{}
	for name, feature := range map[string]func() (result, error){
		"chat": chat, "stream": stream, "tools": tools, "schema": schema,
		"embeddings": embeddings, "refusal": refusal,
	} {
		found, err := feature()
		if err != nil {
			found = result{"error": err.Error()}
		}
		results[name] = found
	}
	if err := json.NewEncoder(os.Stdout).Encode(results); err != nil {
		panic(err)
	}
}
