module modelpack.test/pause

go 1.24
