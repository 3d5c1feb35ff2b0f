// Command ollama-manifest has Ollama's own code write a model into its store ($OLLAMA_MODELS): a
// manifest as its registry serves it, and blobs. Arguments: NAME, then KIND=PATH for each layer, KIND
// being what comes after application/vnd.ollama.image. in its media type.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/ollama/ollama/manifest"
	"github.com/ollama/ollama/types/model"
)

func main() {
	if err := write(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func write(text string, arguments []string) error {
	name := model.ParseName(text)
	if !name.IsFullyQualified() {
		return fmt.Errorf("%q is no whole name", text)
	}
	config := model.ConfigV2{
		ModelFormat: "gguf", ModelFamily: "llama", ModelFamilies: []string{"llama"},
		ModelType: "1.2B", FileType: "Q8_0", Architecture: "amd64", OS: "linux",
		RootFS: model.RootFS{Type: "layers"},
	}
	var layers []manifest.Layer
	for _, argument := range arguments {
		kind, path, found := strings.Cut(argument, "=")
		if !found {
			return fmt.Errorf("%q is not KIND=PATH", argument)
		}
		content, err := os.Open(path)
		if err != nil {
			return err
		}
		layer, err := manifest.NewLayer(content, "application/vnd.ollama.image."+kind)
		content.Close()
		if err != nil {
			return err
		}
		layers = append(layers, layer)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, layer.Digest)
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return err
	}
	written, err := manifest.NewLayer(
		bytes.NewReader(raw), "application/vnd.docker.container.image.v1+json")
	if err != nil {
		return err
	}
	if err := manifest.WriteManifest(name, written, layers); err != nil {
		return err
	}
	path, err := manifest.PathForName(name)
	if err != nil {
		return err
	}
	fmt.Println(path)
	return nil
}
