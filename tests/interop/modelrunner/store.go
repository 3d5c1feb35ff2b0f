package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/docker/model-runner/pkg/distribution/distribution"
	"github.com/docker/model-runner/pkg/distribution/types"
)

// artifact is a model as tests compare it; bytes are base64 in JSON.
type artifact struct {
	Digest   string   `json:"digest"`
	Manifest []byte   `json:"manifest"`
	Config   []byte   `json:"config"`
	Tags     []string `json:"tags,omitempty"`
}

func describe(model types.ModelArtifact) (*artifact, error) {
	manifest, err := model.RawManifest()
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	config, err := model.RawConfigFile()
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	id, err := model.ID()
	if err != nil {
		return nil, fmt.Errorf("digest: %w", err)
	}
	result := &artifact{Digest: id, Manifest: manifest, Config: config}
	if tagged, ok := model.(interface{ Tags() []string }); ok {
		result.Tags = tagged.Tags()
	}
	return result, nil
}

func stored(client *distribution.Client, ref string) (types.ModelArtifact, error) {
	model, err := client.GetModel(ref)
	if err != nil {
		return nil, err
	}
	return asArtifact(model)
}

func asArtifact(model types.Model) (types.ModelArtifact, error) {
	if found, ok := model.(types.ModelArtifact); ok {
		return found, nil
	}
	return nil, fmt.Errorf("a %T has no manifest", model)
}

func runPull(ctx context.Context, args []string) (any, error) {
	o := newOptions("pull")
	if err := o.parse(args, "REF"); err != nil {
		return nil, err
	}
	client, err := o.client()
	if err != nil {
		return nil, err
	}
	if err := client.PullModel(ctx, o.Arg(0), io.Discard); err != nil {
		return nil, err
	}
	model, err := stored(client, o.Arg(0))
	if err != nil {
		return nil, err
	}
	return describe(model)
}

func runPush(ctx context.Context, args []string) (any, error) {
	o := newOptions("push")
	if err := o.parse(args, "REF"); err != nil {
		return nil, err
	}
	client, err := o.client()
	if err != nil {
		return nil, err
	}
	if err := client.PushModel(ctx, o.Arg(0), io.Discard); err != nil {
		return nil, err
	}
	model, err := stored(client, o.Arg(0))
	if err != nil {
		return nil, err
	}
	return describe(model)
}

func runTag(_ context.Context, args []string) (any, error) {
	o := newOptions("tag")
	if err := o.parse(args, "SOURCE", "TARGET"); err != nil {
		return nil, err
	}
	client, err := o.client()
	if err != nil {
		return nil, err
	}
	if err := client.Tag(o.Arg(0), o.Arg(1)); err != nil {
		return nil, err
	}
	model, err := stored(client, o.Arg(1))
	if err != nil {
		return nil, err
	}
	return describe(model)
}

func runList(_ context.Context, args []string) (any, error) {
	o := newOptions("list")
	if err := o.parse(args); err != nil {
		return nil, err
	}
	client, err := o.client()
	if err != nil {
		return nil, err
	}
	models, err := client.ListModels()
	if err != nil {
		return nil, err
	}
	result := make([]*artifact, 0, len(models))
	for _, model := range models {
		found, err := asArtifact(model)
		if err != nil {
			return nil, err
		}
		entry, err := describe(found)
		if err != nil {
			return nil, err
		}
		result = append(result, entry)
	}
	return map[string]any{"models": result}, nil
}

func runLoad(_ context.Context, args []string) (any, error) {
	o := newOptions("load")
	tag := o.String("tag", "", "reference to give to the model")
	if err := o.parse(args, "FILE"); err != nil {
		return nil, err
	}
	client, err := o.client()
	if err != nil {
		return nil, err
	}
	file, err := os.Open(o.Arg(0))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	id, err := client.LoadModel(file, io.Discard)
	if err != nil {
		return nil, err
	}
	if *tag != "" {
		if err := client.Tag(id, *tag); err != nil {
			return nil, err
		}
	}
	model, err := stored(client, id)
	if err != nil {
		return nil, err
	}
	return describe(model)
}

func runExport(_ context.Context, args []string) (any, error) {
	o := newOptions("export")
	if err := o.parse(args, "REF", "FILE"); err != nil {
		return nil, err
	}
	client, err := o.client()
	if err != nil {
		return nil, err
	}
	file, err := os.Create(o.Arg(1))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if err := client.ExportModel(o.Arg(0), file); err != nil {
		return nil, err
	}
	model, err := stored(client, o.Arg(0))
	if err != nil {
		return nil, err
	}
	return describe(model)
}

// runBundle lays a model out and lists its files with their digests. The paths of the weights and
// of the rest are those that a backend would be started with.
func runBundle(_ context.Context, args []string) (any, error) {
	o := newOptions("bundle")
	if err := o.parse(args, "REF"); err != nil {
		return nil, err
	}
	client, err := o.client()
	if err != nil {
		return nil, err
	}
	bundle, err := client.GetBundle(o.Arg(0))
	if err != nil {
		return nil, err
	}
	files, err := digests(bundle.RootDir())
	if err != nil {
		return nil, err
	}
	return map[string]any{
		"dir":           bundle.RootDir(),
		"files":         files,
		"gguf":          bundle.GGUFPath(),
		"safetensors":   bundle.SafetensorsPath(),
		"dduf":          bundle.DDUFPath(),
		"mmproj":        bundle.MMPROJPath(),
		"chat_template": bundle.ChatTemplatePath(),
	}, nil
}

func digests(root string) (map[string]string, error) {
	found := map[string]string{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		hash := sha256.New()
		if _, err := io.Copy(hash, file); err != nil {
			return err
		}
		relative, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		found[filepath.ToSlash(relative)] = "sha256:" + hex.EncodeToString(hash.Sum(nil))
		return nil
	})
	return found, err
}
