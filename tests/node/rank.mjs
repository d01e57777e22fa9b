// node rank.mjs PROTO ADDRESS REQUEST_JSON: make one Rank call, print the response (or the error) as JSON.
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const [proto, address, request] = process.argv.slice(2);
const definition = protoLoader.loadSync(proto, { keepCase: true, longs: String, defaults: true });
const { RankingService } = grpc.loadPackageDefinition(definition).pinrank.v1;
// No proxy stands between two processes of one machine.
const client = new RankingService(address, grpc.credentials.createInsecure(), { 'grpc.enable_http_proxy': 0 });
client.Rank(JSON.parse(request), { deadline: Date.now() + 20000 }, (error, response) => {
  console.log(JSON.stringify(error ? { code: error.code, details: error.details } : response));
  client.close();
});
