//! Run async-openai against the server at the URL given and print its results as JSON:
//! {feature: result, or {"error": text}}.

use std::error::Error;

use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionMessageToolCalls, ChatCompletionNamedToolChoice,
    ChatCompletionRequestAssistantMessageArgs, ChatCompletionRequestMessage,
    ChatCompletionRequestToolMessageArgs, ChatCompletionRequestUserMessageArgs,
    ChatCompletionStreamOptions, ChatCompletionTool, ChatCompletionToolChoiceOption,
    ChatCompletionTools, CreateChatCompletionRequest, CreateChatCompletionRequestArgs,
    FunctionName, FunctionObject, ResponseFormat, ResponseFormatJsonSchema, ToolChoiceOptions,
};
use async_openai::types::embeddings::{CreateEmbeddingRequestArgs, EncodingFormat};
use async_openai::Client;
use futures::StreamExt;
use serde_json::{json, Map, Value};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Session {
    client: Client<OpenAIConfig>,
    chat_model: String,
    embedding_model: String,
}

fn city_schema() -> Value {
    json!({
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": false,
    })
}

impl Session {
    fn request(&self, tokens: u32) -> Result<CreateChatCompletionRequest> {
        let question = ChatCompletionRequestUserMessageArgs::default()
            .content("What is the capital of France?")
            .build()?;
        Ok(CreateChatCompletionRequestArgs::default()
            .model(&self.chat_model)
            .max_completion_tokens(tokens)
            .temperature(0.0)
            .messages([question.into()])
            .build()?)
    }

    async fn chat(&self) -> Result<Value> {
        let reply = self.client.chat().create(self.request(12)?).await?;
        let usage = reply.usage.ok_or("no usage")?;
        Ok(json!({
            "text": reply.choices[0].message.content,
            "finish": reply.choices[0].finish_reason,
            "tokens": [usage.prompt_tokens, usage.completion_tokens],
        }))
    }

    async fn stream(&self) -> Result<Value> {
        let mut request = self.request(12)?;
        request.stream_options = Some(ChatCompletionStreamOptions {
            include_usage: Some(true),
            include_obfuscation: None,
        });
        let mut chunks = self.client.chat().create_stream(request).await?;
        let (mut text, mut pieces) = (String::new(), 0);
        let (mut finish, mut tokens) = (Value::Null, Value::Null);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk?;
            if let Some(usage) = chunk.usage {
                tokens = json!([usage.prompt_tokens, usage.completion_tokens]);
            }
            for choice in chunk.choices {
                if let Some(piece) = choice.delta.content {
                    text.push_str(&piece);
                    pieces += 1;
                }
                if let Some(reason) = choice.finish_reason {
                    finish = json!(reason);
                }
            }
        }
        Ok(json!({"text": text, "pieces": pieces, "finish": finish, "tokens": tokens}))
    }

    async fn tools(&self) -> Result<Value> {
        let mut request = self.request(40)?;
        request.tools = Some(vec![ChatCompletionTools::Function(ChatCompletionTool {
            function: FunctionObject {
                name: "weather".into(),
                parameters: Some(city_schema()),
                ..Default::default()
            },
        })]);
        let named = ChatCompletionNamedToolChoice {
            function: FunctionName { name: "weather".into() },
        };
        request.tool_choice = Some(ChatCompletionToolChoiceOption::Function(named));
        let reply = self.client.chat().create(request.clone()).await?;
        let calls = reply.choices[0].message.tool_calls.clone().ok_or("no tool calls")?;
        let [ChatCompletionMessageToolCalls::Function(call)] = &calls[..] else {
            return Err(format!("expected one call of a function, got {calls:?}").into());
        };
        let arguments: Value = serde_json::from_str(&call.function.arguments)?;
        let id = call.id.clone();
        let called = ChatCompletionRequestAssistantMessageArgs::default()
            .tool_calls(calls)
            .build()?;
        let returned = ChatCompletionRequestToolMessageArgs::default()
            .tool_call_id(id)
            .content("sunny")
            .build()?;
        let further: [ChatCompletionRequestMessage; 2] = [called.into(), returned.into()];
        request.messages.extend(further);
        request.tool_choice = Some(ChatCompletionToolChoiceOption::Mode(ToolChoiceOptions::None));
        let answer = self.client.chat().create(request).await?;
        Ok(json!({
            "called": [arguments["city"]],
            "text": answer.choices[0].message.content,
        }))
    }

    async fn schema(&self) -> Result<Value> {
        let mut request = self.request(40)?;
        request.response_format = Some(ResponseFormat::JsonSchema {
            json_schema: ResponseFormatJsonSchema {
                description: None,
                name: "city".into(),
                schema: city_schema(),
                strict: Some(true),
            },
        });
        let reply = self.client.chat().create(request).await?;
        let text = reply.choices[0].message.content.as_deref().ok_or("no content")?;
        Ok(json!({"object": serde_json::from_str::<Value>(text)?}))
    }

    async fn embeddings(&self) -> Result<Value> {
        let input = "Paris is a city.";
        let mut request = CreateEmbeddingRequestArgs::default()
            .model(&self.embedding_model)
            .input([input])
            .build()?;
        let numbers = self.client.embeddings().create(request.clone()).await?;
        request.encoding_format = Some(EncodingFormat::Base64);
        let encoded = self.client.embeddings().create_base64(request).await?;
        let first = numbers.data[0].embedding.clone();
        let second: Vec<f32> = encoded.data[0].embedding.clone().into();
        Ok(json!({"lengths": [first.len(), second.len()], "vectors": [first, second]}))
    }

    async fn refusal(&self) -> Result<Value> {
        let mut request = self.request(12)?;
        request.model = "nope".into();
        match self.client.chat().create(request).await {
            Err(OpenAIError::ApiError(refused)) => Ok(json!({
                "status": refused.status_code.as_u16(),
                "code": refused.api_error.code,
            })),
            other => Err(format!("expected an ApiError, got {other:?}").into()),
        }
    }
}

fn result(found: Result<Value>) -> Value {
    found.unwrap_or_else(|error| json!({"error": error.to_string()}))
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let config = OpenAIConfig::new()
        .with_api_base(format!("{}/v1", arguments[1]))
        .with_api_key("none");
    let session = Session {
        client: Client::with_config(config),
        chat_model: arguments[2].clone(),
        embedding_model: arguments[3].clone(),
    };
    let mut results = Map::new();
    results.insert("chat".into(), result(session.chat().await));
    results.insert("stream".into(), result(session.stream().await));
    results.insert("tools".into(), result(session.tools().await));
    results.insert("schema".into(), result(session.schema().await));
    results.insert("embeddings".into(), result(session.embeddings().await));
    results.insert("refusal".into(), result(session.refusal().await));
    println!("{}", Value::Object(results));
}
