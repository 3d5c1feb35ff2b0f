package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/model-runner/pkg/distribution/builder"
	"github.com/docker/model-runner/pkg/distribution/distribution"
	"github.com/docker/model-runner/pkg/distribution/tarball"
	"github.com/docker/model-runner/pkg/distribution/types"
)

// stringList is a flag that may be given several times.
type stringList []string

func (l *stringList) String() string { return strings.Join(*l, " ") }

func (l *stringList) Set(value string) error {
	*l = append(*l, value)
	return nil
}

type packageOptions struct {
	*options
	gguf, safetensorsDir, dduf, from string
	licenses                         stringList
	chatTemplate, mmproj             string
	contextSize                      uint64
	format, created                  string
	push, tag                        string
}

// runPackage makes what `docker model package` makes of the same flags. `--push REF` writes it to a
// registry, `--store DIR [--tag REF]` loads it as a tar archive, which is what the command line does
// with the daemon; both together do both.
func runPackage(ctx context.Context, args []string) (any, error) {
	o := &packageOptions{options: newOptions("package")}
	o.StringVar(&o.gguf, "gguf", "", "GGUF file, or any shard")
	o.StringVar(&o.safetensorsDir, "safetensors-dir", "", "directory")
	o.StringVar(&o.dduf, "dduf", "", "DDUF file")
	o.StringVar(&o.from, "from", "", "model in --store")
	o.Var(&o.licenses, "license", "license file, repeatable")
	o.StringVar(&o.chatTemplate, "chat-template", "", "Jinja file")
	o.StringVar(&o.mmproj, "mmproj", "", "projector file")
	o.Uint64Var(&o.contextSize, "context-size", 0, "tokens")
	o.StringVar(&o.format, "format", "docker", "docker or cncf")
	o.StringVar(&o.created, "created", "", "RFC 3339 time of the build, now by default")
	o.StringVar(&o.push, "push", "", "reference to push to")
	o.StringVar(&o.tag, "tag", "", "reference in --store")
	if err := o.parse(args); err != nil {
		return nil, err
	}
	model, err := o.build()
	if err != nil {
		return nil, err
	}
	if o.push != "" {
		target, err := o.registry().NewTarget(o.push)
		if err != nil {
			return nil, err
		}
		if err := model.Build(ctx, target, io.Discard); err != nil {
			return nil, err
		}
	}
	if o.store != "" {
		if err := o.load(ctx, model); err != nil {
			return nil, err
		}
	}
	return describe(model.Model())
}

func (o *packageOptions) build() (*builder.Builder, error) {
	model, err := o.source()
	if err != nil {
		return nil, err
	}
	if o.given("context-size") {
		// The conversion wraps around, as the real command's does.
		if model, err = model.WithContextSize(int32(o.contextSize)); err != nil {
			return nil, err
		}
	}
	for _, path := range o.licenses {
		if model, err = model.WithLicense(path); err != nil {
			return nil, err
		}
	}
	if o.chatTemplate != "" {
		if model, err = model.WithChatTemplateFile(o.chatTemplate); err != nil {
			return nil, err
		}
	}
	if o.mmproj != "" {
		if model, err = model.WithMultimodalProjector(o.mmproj); err != nil {
			return nil, err
		}
	}
	return model, nil
}

// source opens the one thing to package. A format that was not asked for is left to the builder.
func (o *packageOptions) source() (*builder.Builder, error) {
	var fileOptions []builder.BuildOption
	var directoryOptions []builder.DirectoryOption
	if o.given("format") {
		format := builder.BuildFormat(o.format)
		if format != builder.BuildFormatDocker && format != builder.BuildFormatCNCF {
			return nil, fmt.Errorf("--format is docker or cncf, not %q", o.format)
		}
		fileOptions = append(fileOptions, builder.WithFormat(format))
		directoryOptions = append(directoryOptions, builder.WithOutputFormat(format))
	}
	if o.created != "" {
		created, err := time.Parse(time.RFC3339Nano, o.created)
		if err != nil {
			return nil, fmt.Errorf("--created: %w", err)
		}
		fileOptions = append(fileOptions, builder.WithCreated(created))
		directoryOptions = append(directoryOptions, builder.WithCreatedTime(created))
	}
	switch {
	case o.gguf != "":
		return builder.FromPath(o.gguf, fileOptions...)
	case o.dduf != "":
		return builder.FromPath(o.dduf, fileOptions...)
	case o.safetensorsDir != "":
		return builder.FromDirectory(o.safetensorsDir, directoryOptions...)
	case o.from != "":
		client, err := o.client()
		if err != nil {
			return nil, err
		}
		artifact, err := stored(client, o.from)
		if err != nil {
			return nil, err
		}
		return builder.FromModel(artifact, fileOptions...)
	}
	return nil, errors.New("one of --gguf, --safetensors-dir, --dduf and --from is required")
}

func (o *packageOptions) load(ctx context.Context, model *builder.Builder) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	if o.from != "" && model.HasOnlyConfigChanges() {
		if o.tag == "" {
			return errors.New("--from without new layers needs --tag")
		}
		return client.WriteLightweightModel(model.Model(), []string{o.tag})
	}
	id, err := loadInto(ctx, client, model.Model())
	if err != nil || o.tag == "" {
		return err
	}
	return client.Tag(id, o.tag)
}

// loadInto streams the archive of a model into a store, never holding it whole.
func loadInto(
	ctx context.Context, client *distribution.Client, model types.ModelArtifact,
) (string, error) {
	reader, writer := io.Pipe()
	go func() {
		target, err := tarball.NewTarget(writer)
		if err == nil {
			err = target.Write(ctx, model, nil)
		}
		writer.CloseWithError(err) // nil closes with io.EOF
	}()
	id, err := client.LoadModel(reader, io.Discard)
	reader.CloseWithError(err)
	return id, err
}
