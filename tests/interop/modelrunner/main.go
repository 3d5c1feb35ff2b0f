// Command modelrunner-peer drives Docker Model Runner's own distribution code, so that tests can
// compare what it packages, stores, pulls and pushes with what Modelpack does.
//
// Each subcommand prints one JSON object on stdout. A failure is one line on stderr and status 1.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"sort"
	"strings"

	"github.com/docker/model-runner/pkg/distribution/distribution"
	"github.com/docker/model-runner/pkg/distribution/oci/reference"
	"github.com/docker/model-runner/pkg/distribution/registry"
)

const upstream = "github.com/docker/model-runner"

type command func(ctx context.Context, args []string) (any, error)

var commands = map[string]command{
	"bundle":    runBundle,
	"export":    runExport,
	"list":      runList,
	"load":      runLoad,
	"package":   runPackage,
	"pull":      runPull,
	"push":      runPush,
	"reference": runReference,
	"tag":       runTag,
	"version":   runVersion,
}

func main() {
	result, err := guarded(context.Background(), os.Args[1:])
	if err == nil {
		encoder := json.NewEncoder(os.Stdout)
		encoder.SetEscapeHTML(false)
		err = encoder.Encode(result)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "modelrunner-peer: %v\n", err)
		os.Exit(1)
	}
}

// guarded turns a panic into an error: the GGUF reader panics on some malformed headers.
func guarded(ctx context.Context, args []string) (result any, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v", cause)
		}
	}()
	return dispatch(ctx, args)
}

func dispatch(ctx context.Context, args []string) (any, error) {
	names := make([]string, 0, len(commands))
	for name := range commands {
		names = append(names, name)
	}
	sort.Strings(names)
	if len(args) == 0 {
		return nil, fmt.Errorf("name a subcommand: %s", strings.Join(names, ", "))
	}
	run, known := commands[args[0]]
	if !known {
		return nil, fmt.Errorf("no subcommand %q; there are %s", args[0], strings.Join(names, ", "))
	}
	return run(ctx, args[1:])
}

// options are the flags that several subcommands share.
type options struct {
	*flag.FlagSet
	store     string
	plainHTTP bool
}

func newOptions(name string) *options {
	o := &options{FlagSet: flag.NewFlagSet(name, flag.ContinueOnError)}
	o.SetOutput(io.Discard) // the error says it all, and main prints it
	o.StringVar(&o.store, "store", "", "root of Docker Model Runner's store")
	o.BoolVar(&o.plainHTTP, "plain-http", false, "talk http to every registry, loopback addresses too")
	return o
}

// parse reads the flags and insists on exactly the named positional arguments.
func (o *options) parse(args []string, positional ...string) error {
	if err := o.FlagSet.Parse(args); err != nil {
		return fmt.Errorf("%s: %w", o.Name(), err)
	}
	if o.NArg() != len(positional) {
		return fmt.Errorf("%s takes the arguments [%s], got %q",
			o.Name(), strings.Join(positional, " "), o.Args())
	}
	return nil
}

// given tells whether the user wrote the flag, whatever its value.
func (o *options) given(name string) bool {
	found := false
	o.Visit(func(f *flag.Flag) { found = found || f.Name == name })
	return found
}

func (o *options) registry() *registry.Client {
	return registry.NewClient(registry.WithPlainHTTP(o.plainHTTP))
}

func (o *options) client() (*distribution.Client, error) {
	if o.store == "" {
		return nil, errors.New("--store is required")
	}
	logger := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	return distribution.NewClient(
		distribution.WithStoreRootPath(o.store),
		distribution.WithRegistryClient(o.registry()),
		distribution.WithLogger(logger),
	)
}

func runVersion(_ context.Context, args []string) (any, error) {
	if err := newOptions("version").parse(args); err != nil {
		return nil, err
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return nil, errors.New("this binary has no build information")
	}
	for _, dependency := range info.Deps {
		if dependency.Path == upstream {
			return map[string]string{
				"module": upstream, "version": dependency.Version, "go": info.GoVersion,
			}, nil
		}
	}
	return nil, fmt.Errorf("this binary does not contain %s", upstream)
}

// runReference parses as the store's tags, `docker model tag` and `docker model package` do.
func runReference(_ context.Context, args []string) (any, error) {
	o := newOptions("reference")
	if err := o.parse(args, "REF"); err != nil {
		return nil, err
	}
	parsed, err := reference.ParseReference(o.Arg(0), registry.GetDefaultRegistryOptions()...)
	if err != nil {
		return nil, err
	}
	return map[string]string{
		"reference": parsed.String(), "scheme": parsed.Context().Registry.Scheme(),
	}, nil
}
