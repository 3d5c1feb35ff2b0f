import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import dev.langchain4j.agent.tool.ToolExecutionRequest;
import dev.langchain4j.agent.tool.ToolSpecification;
import dev.langchain4j.data.message.ChatMessage;
import dev.langchain4j.data.message.ToolExecutionResultMessage;
import dev.langchain4j.data.message.UserMessage;
import dev.langchain4j.exception.HttpException;
import dev.langchain4j.exception.ModelNotFoundException;
import dev.langchain4j.model.chat.request.ChatRequest;
import dev.langchain4j.model.chat.request.ResponseFormat;
import dev.langchain4j.model.chat.request.ResponseFormatType;
import dev.langchain4j.model.chat.request.ToolChoice;
import dev.langchain4j.model.chat.request.json.JsonObjectSchema;
import dev.langchain4j.model.chat.request.json.JsonSchema;
import dev.langchain4j.model.chat.response.ChatResponse;
import dev.langchain4j.model.chat.response.StreamingChatResponseHandler;
import dev.langchain4j.model.openai.OpenAiChatModel;
import dev.langchain4j.model.openai.OpenAiEmbeddingModel;
import dev.langchain4j.model.openai.OpenAiStreamingChatModel;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;

/**
 * Run LangChain4j against the server at the URL given and print its results as JSON: {feature:
 * result, or {"error": text}}.
 */
public class Client {
    private static final ObjectMapper JSON = new ObjectMapper();
    private static final JsonObjectSchema CITY = JsonObjectSchema.builder()
            .addStringProperty("city")
            .required("city")
            .additionalProperties(false)
            .build();

    private final String url;
    private final String chatModel;
    private final String embeddingModel;

    private Client(String url, String chatModel, String embeddingModel) {
        this.url = url;
        this.chatModel = chatModel;
        this.embeddingModel = embeddingModel;
    }

    private OpenAiChatModel model(String name) {
        return OpenAiChatModel.builder()
                .baseUrl(url)
                .apiKey("none")
                .modelName(name)
                .temperature(0.0)
                .strictJsonSchema(true)
                .maxRetries(0)
                .build();
    }

    private static ChatRequest.Builder request(int tokens, ChatMessage... messages) {
        ChatRequest.Builder request = ChatRequest.builder().maxOutputTokens(tokens);
        return messages.length > 0
                ? request.messages(messages)
                : request.messages(UserMessage.from("What is the capital of France?"));
    }

    private static Map<String, Object> reply(ChatResponse response) {
        Map<String, Object> found = new LinkedHashMap<>();
        found.put("text", response.aiMessage().text());
        found.put("finish", response.finishReason().name().toLowerCase());
        found.put("tokens", List.of(
                response.tokenUsage().inputTokenCount(), response.tokenUsage().outputTokenCount()));
        return found;
    }

    private Map<String, Object> chat() {
        return reply(model(chatModel).chat(request(12).build()));
    }

    private Map<String, Object> stream() throws Exception {
        OpenAiStreamingChatModel model = OpenAiStreamingChatModel.builder()
                .baseUrl(url).apiKey("none").modelName(chatModel).temperature(0.0).build();
        CompletableFuture<ChatResponse> whole = new CompletableFuture<>();
        List<String> pieces = new ArrayList<>();
        model.chat(request(12).build(), new StreamingChatResponseHandler() {
            @Override
            public void onPartialResponse(String piece) {
                pieces.add(piece);
            }

            @Override
            public void onCompleteResponse(ChatResponse response) {
                whole.complete(response);
            }

            @Override
            public void onError(Throwable error) {
                whole.completeExceptionally(error);
            }
        });
        Map<String, Object> found = reply(whole.get(60, TimeUnit.SECONDS));
        found.put("text", String.join("", pieces));
        found.put("pieces", pieces.size());
        return found;
    }

    private Map<String, Object> tools() throws Exception {
        ToolSpecification weather =
                ToolSpecification.builder().name("weather").parameters(CITY).build();
        UserMessage question = UserMessage.from("What is the capital of France?");
        ChatResponse first = model(chatModel).chat(request(40, question)
                .toolSpecifications(weather).toolChoice(ToolChoice.REQUIRED).build());
        ToolExecutionRequest call = first.aiMessage().toolExecutionRequests().get(0);
        ChatResponse second = model(chatModel).chat(
                request(40, question, first.aiMessage(), ToolExecutionResultMessage.from(call, "sunny"))
                        .toolSpecifications(weather).toolChoice(ToolChoice.NONE).build());
        return Map.of(
                "called", List.of(JSON.readTree(call.arguments()).get("city")),
                "text", second.aiMessage().text());
    }

    private Map<String, Object> schema() throws Exception {
        ResponseFormat format = ResponseFormat.builder()
                .type(ResponseFormatType.JSON)
                .jsonSchema(JsonSchema.builder().name("city").rootElement(CITY).build())
                .build();
        ChatResponse response = model(chatModel).chat(request(40).responseFormat(format).build());
        JsonNode object = JSON.readTree(response.aiMessage().text());
        return Map.of("object", object);
    }

    private Map<String, Object> embeddings() {
        List<float[]> vectors = new ArrayList<>();
        for (String format : List.of("float", "base64")) {
            vectors.add(OpenAiEmbeddingModel.builder()
                    .baseUrl(url).apiKey("none").modelName(embeddingModel).encodingFormat(format)
                    .build().embed("Paris is a city.").content().vector());
        }
        return Map.of(
                "lengths", vectors.stream().map(vector -> vector.length).toList(),
                "vectors", vectors);
    }

    private Map<String, Object> refusal() throws Exception {
        try {
            model("nope").chat(request(12).build());
        } catch (ModelNotFoundException error) {
            HttpException cause = (HttpException) error.getCause();
            String code = JSON.readTree(cause.getMessage()).at("/error/code").asText();
            return Map.of("status", cause.statusCode(), "code", code);
        }
        throw new IllegalStateException("an unknown model was not refused");
    }

    private static Object result(Callable<Map<String, Object>> feature) {
        try {
            return feature.call();
        } catch (Exception error) {
            return Map.of("error", error.toString());
        }
    }

    public static void main(String[] arguments) throws Exception {
        Client client = new Client(arguments[0] + "/v1", arguments[1], arguments[2]);
        Map<String, Object> results = new LinkedHashMap<>();
        results.put("chat", result(client::chat));
        results.put("stream", result(client::stream));
        results.put("tools", result(client::tools));
        results.put("schema", result(client::schema));
        results.put("embeddings", result(client::embeddings));
        results.put("refusal", result(client::refusal));
        System.out.println(JSON.writeValueAsString(results));
        System.exit(0); // the HTTP client keeps threads
    }
}
