// What each client of npm makes of the servers at the URLs given, as JSON on standard output:
// {client: {feature: result, or {"error": text}}}. The second server has a model that reads pictures.

import { createReadStream, readFileSync } from 'node:fs';

import Anthropic from '@anthropic-ai/sdk';
import { jsonSchemaOutputFormat } from '@anthropic-ai/sdk/helpers/json-schema';
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateObject, generateText, stepCountIs, streamText, tool } from 'ai';
import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const [url, chatModel, embeddingModel, speechModel, sound, picturesUrl, picturesModel, picture] =
  process.argv.slice(2);
const png = readFileSync(picture).toString('base64');
const pictureUrl = `data:image/png;base64,${png}`;
const aboutPicture = 'What is it?';
const question = 'What is the capital of France?';
const messages = [{ role: 'user', content: question }];
const texts = ['Paris is a city.', 'It rains.'];
const City = z.object({ city: z.string().max(12) });
const weather = {
  type: 'object',
  properties: { city: { type: 'string', maxLength: 12 } },
  required: ['city'],
  additionalProperties: false,
};

function openaiFeatures() {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 });
  const picturesClient = client.withOptions({ baseURL: `${picturesUrl}/v1` });
  const askedAboutPicture = {
    model: picturesModel,
    messages: [
      {
        role: 'user',
        content: [
          { type: 'image_url', image_url: { url: pictureUrl, detail: 'auto' } },
          { type: 'text', text: aboutPicture },
        ],
      },
    ],
    temperature: 0,
    max_tokens: 8,
    ignore_eos: true,
  };
  const asked = { model: chatModel, messages, temperature: 0, max_tokens: 12 };
  const choice = (completion) => completion.choices[0];
  return {
    async chat() {
      const completion = await client.chat.completions.create(asked);
      const { message, finish_reason } = choice(completion);
      return { text: message.content, finish: finish_reason, usage: completion.usage };
    },
    async stream() {
      const stream = client.chat.completions.stream({
        ...asked,
        stream_options: { include_usage: true },
      });
      let pieces = 0;
      stream.on('content', () => (pieces += 1));
      const completion = await stream.finalChatCompletion();
      const { message, finish_reason } = choice(completion);
      return { text: message.content, finish: finish_reason, usage: completion.usage, pieces };
    },
    async tools() {
      const called = [];
      const runner = client.chat.completions.runTools({
        ...asked,
        stream: true,
        max_tokens: 40,
        tools: [
          {
            type: 'function',
            function: {
              name: 'weather',
              description: 'The weather of a city',
              parameters: weather,
              parse: JSON.parse,
              function: ({ city }) => (called.push(city), 'sunny'),
            },
          },
        ],
        tool_choice: { type: 'function', function: { name: 'weather' } },
      });
      await runner.finalChatCompletion(); // a named tool is called once
      return { called };
    },
    async schema() {
      const format = zodResponseFormat(City, 'city');
      const completion = await client.chat.completions.parse({
        ...asked,
        max_tokens: 40,
        response_format: format,
      });
      return { object: choice(completion).message.parsed };
    },
    async embeddings() {
      const { data } = await client.embeddings.create({ model: embeddingModel, input: texts });
      return { lengths: data.map(({ embedding }) => embedding.length), first: data[0].embedding };
    },
    async transcription() {
      const asked = { model: speechModel, language: 'en' };
      const file = () => createReadStream(sound);
      const whole = await client.audio.transcriptions.create({
        ...asked,
        file: file(),
        response_format: 'verbose_json',
        timestamp_granularities: ['word'],
      });
      const stream = await client.audio.transcriptions.create({
        ...asked,
        file: file(),
        stream: true,
      });
      const deltas = [];
      for await (const { delta } of stream) if (delta !== undefined) deltas.push(delta);
      return { text: whole.text, words: whole.words.map(({ word }) => word), deltas };
    },
    async picture() {
      const completion = await picturesClient.chat.completions.create(askedAboutPicture);
      return { text: choice(completion).message.content };
    },
    async pictureStream() {
      const stream = picturesClient.chat.completions.stream(askedAboutPicture);
      return { text: choice(await stream.finalChatCompletion()).message.content };
    },
    async pictureResponses() {
      const response = await picturesClient.responses.create({
        model: picturesModel,
        input: [
          {
            role: 'user',
            content: [
              { type: 'input_image', image_url: pictureUrl, detail: 'auto' },
              { type: 'input_text', text: aboutPicture },
            ],
          },
        ],
        temperature: 0,
        max_output_tokens: 8,
        ignore_eos: true,
      });
      return { text: response.output_text };
    },
    async badPicture() {
      const [user] = askedAboutPicture.messages;
      const content = [{ type: 'image_url', image_url: { url: 'data:image/png;base64,AAAA' } }];
      try {
        await picturesClient.chat.completions.create({
          ...askedAboutPicture,
          messages: [{ ...user, content }],
        });
        return {};
      } catch (error) {
        return { name: error.constructor.name, status: error.status, param: error.param };
      }
    },
    async responses() {
      const response = await client.responses.create({
        model: chatModel,
        input: question,
        temperature: 0,
        max_output_tokens: 12,
      });
      return { text: response.output_text, status: response.status };
    },
    async responsesSchema() {
      const response = await client.responses.parse({
        model: chatModel,
        input: question,
        temperature: 0,
        max_output_tokens: 40,
        text: { format: zodTextFormat(City, 'city') },
      });
      return { object: response.output_parsed };
    },
    async models() {
      const found = [];
      for await (const model of client.models.list()) found.push(model.id);
      return { found };
    },
    async refusal() {
      try {
        await client.chat.completions.create({ ...asked, model: 'nope' });
        return {};
      } catch (error) {
        return { name: error.constructor.name, status: error.status, code: error.code };
      }
    },
  };
}

function anthropicFeatures() {
  const client = new Anthropic({ baseURL: `${url}/anthropic`, apiKey: 'none', maxRetries: 0 });
  const asked = { model: chatModel, messages, temperature: 0, max_tokens: 12 };
  return {
    async chat() {
      const message = await client.messages.create(asked);
      return { text: message.content[0].text, finish: message.stop_reason, usage: message.usage };
    },
    async stream() {
      let pieces = 0;
      const stream = client.messages.stream(asked).on('text', () => (pieces += 1));
      const { content, stop_reason, usage } = await stream.finalMessage();
      return { text: content[0].text, finish: stop_reason, usage, pieces };
    },
    async tools() {
      const tools = [{ name: 'weather', description: 'The weather', input_schema: weather }];
      const stream = client.messages.stream({
        ...asked,
        max_tokens: 40,
        tools,
        tool_choice: { type: 'tool', name: 'weather' },
      });
      const message = await stream.finalMessage();
      const call = message.content.find(({ type }) => type === 'tool_use');
      const answer = await client.messages.create({
        ...asked,
        messages: [
          ...messages,
          { role: 'assistant', content: message.content },
          {
            role: 'user',
            content: [{ type: 'tool_result', tool_use_id: call.id, content: 'sunny' }],
          },
        ],
        tools,
      });
      return {
        called: [call.input.city],
        finish: message.stop_reason,
        text: answer.content[0].text,
      };
    },
    async schema() {
      const message = await client.messages.parse({
        ...asked,
        max_tokens: 40,
        output_config: { format: jsonSchemaOutputFormat(weather) },
      });
      return { object: message.parsed_output };
    },
    async picture() {
      const source = { type: 'base64', media_type: 'image/png', data: png };
      const content = [
        { type: 'image', source },
        { type: 'text', text: aboutPicture },
      ];
      const message = await client.withOptions({ baseURL: `${picturesUrl}/anthropic` }).messages.create({
        model: picturesModel,
        messages: [{ role: 'user', content }],
        temperature: 0,
        max_tokens: 8,
      });
      return { text: message.content[0].text };
    },
    async count() {
      const counted = await client.messages.countTokens({ model: chatModel, messages });
      return { tokens: counted.input_tokens };
    },
    async models() {
      const found = [];
      for await (const model of client.models.list()) found.push(model.id);
      return { found };
    },
    async refusal() {
      try {
        await client.messages.create({ ...asked, model: 'nope' });
        return {};
      } catch (error) {
        return { name: error.constructor.name, status: error.status, type: error.type };
      }
    },
  };
}

function vercelFeatures(model, picturesModel) {
  const asked = { model, prompt: question, temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
  const counts = ({ inputTokens, outputTokens }) => ({ inputTokens, outputTokens });
  return {
    async chat() {
      const { text, finishReason, usage } = await generateText(asked);
      return { text, finish: finishReason, usage: counts(usage) };
    },
    async stream() {
      let failure;
      const result = streamText({ ...asked, onError: ({ error }) => (failure = error) });
      let text = '';
      let pieces = 0;
      for await (const piece of result.textStream) {
        text += piece;
        pieces += 1;
      }
      if (failure) throw failure;
      return { text, finish: await result.finishReason, usage: counts(await result.usage), pieces };
    },
    async tools() {
      const called = [];
      let failure;
      const result = streamText({
        ...asked,
        onError: ({ error }) => (failure = error),
        maxOutputTokens: 40,
        tools: {
          weather: tool({
            description: 'The weather of a city',
            inputSchema: City,
            execute: async ({ city }) => (called.push(city), 'sunny'),
          }),
        },
        prepareStep: ({ stepNumber }) => ({
          toolChoice: stepNumber === 0 ? { type: 'tool', toolName: 'weather' } : 'none',
        }),
        stopWhen: stepCountIs(2),
      });
      await result.consumeStream();
      if (failure) throw failure;
      const [first] = await result.steps;
      return { called, finish: first.finishReason, text: await result.text };
    },
    async picture() {
      const content = [
        { type: 'image', image: pictureUrl },
        { type: 'text', text: aboutPicture },
      ];
      const { text } = await generateText({
        model: picturesModel,
        messages: [{ role: 'user', content }],
        temperature: 0,
        maxOutputTokens: 8,
        maxRetries: 0,
      });
      return { text };
    },
    async schema() {
      const { object } = await generateObject({ ...asked, schema: City, maxOutputTokens: 60 });
      return { object };
    },
  };
}

const compatible = (url) =>
  createOpenAICompatible({
    name: 'modelpack',
    baseURL: `${url}/v1`,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const messagesOf = (url) => createAnthropic({ baseURL: `${url}/anthropic/v1`, apiKey: 'none' });
const clients = {
  openai: openaiFeatures(),
  anthropic: anthropicFeatures(),
  'ai with openai-compatible': {
    ...vercelFeatures(compatible(url)(chatModel), compatible(picturesUrl)(picturesModel)),
    async embeddings() {
      const model = compatible(url).textEmbeddingModel(embeddingModel);
      const { embeddings } = await embedMany({ model, values: texts, maxRetries: 0 });
      return { lengths: embeddings.map(({ length }) => length), first: embeddings[0] };
    },
  },
  'ai with anthropic': vercelFeatures(
    messagesOf(url)(chatModel),
    messagesOf(picturesUrl)(picturesModel),
  ),
};

globalThis.AI_SDK_LOG_WARNINGS = false;
const results = {};
for (const [client, features] of Object.entries(clients)) {
  results[client] = {};
  for (const [feature, run] of Object.entries(features)) {
    try {
      results[client][feature] = await run();
    } catch (error) {
      results[client][feature] = { error: `${error.stack}\n${error.responseBody ?? ''}` };
    }
  }
}
console.log(JSON.stringify(results));
